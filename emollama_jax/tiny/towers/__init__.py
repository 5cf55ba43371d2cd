"""`emollama pretrain`: how the small towers that the package carries are made."""
