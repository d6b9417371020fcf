"""What the programs train.py, generate.py and evaluate.py are made of: one idea a file.

corpus  which files, in which order, which are held out      tokens     bytes (or BPE) and back
cache   tokens on disk, memory-mapped                        loader     which window comes at which step
ngram   the baselines: byte n-grams and lzma                 checkpoint atomic folders, the lock, resume
session the training loop's state around the sharder         evaluation bits per byte, perplexity
metrics progress  plot  report                               what a person sees
"""
