"""Text from any artifact: sampling, streaming, several prompts at once, chats, a draft that guesses ahead.

Everything goes through the runtime protocol, so torch and ONNX Runtime run the same code, and an ONNX folder
needs neither torch nor transformers.
"""
