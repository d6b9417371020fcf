"""What the programs train.py, generate.py and evaluate.py are made of: one idea a file.

corpus       which files, in which order, which are held out    fallback    text where there are no files
tokens       bytes (or BPE) and back                            cache       tokens on disk, memory-mapped
loader       which window comes at which step                   settings    the flags, and what a resume may change
session      model and parameter server, to disk and back       checkpoint  atomic folders, the lock
interrupts   Ctrl-C as a request                                errors      one clear line instead of a traceback
ngram        the baselines: byte n-grams and lzma               evaluation  bits per byte, perplexity
generation   text as it is drawn                                trained     a model out of a checkpoint
metrics      JSON lines                                         progress    the bar
plot         the loss curve                                     report      Markdown and JSON
finish       the end of a run                                   machine     what it ran on
status       staleness, bytes and retries, beside the bar
"""
