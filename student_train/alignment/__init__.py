"""One text in two tokenisations: chunks of equal bytes, and what both sides can say in them.

No torch here: the alignment is a function of a cache and a student's tokenizer.
"""
