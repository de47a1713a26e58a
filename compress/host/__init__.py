"""The machine: its cores, memory, processes and terminal."""
