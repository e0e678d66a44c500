"""GGUF: llama.cpp's converter, quantized rows, and the check that runs the file."""
