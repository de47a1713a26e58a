"""The tools of `benchmarks/quantization.py`: what each is given, one worker per tool, scorer and picture."""
