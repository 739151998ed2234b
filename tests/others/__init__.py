"""``python -m tests.others PATH``: the weight norm tests of PyTorch, transformers or anybody else,
with torch's functions and with ours."""
