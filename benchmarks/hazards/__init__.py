"""Parts of `benchmarks/campaign.py`: what is killed, raced, starved of disk, mutated."""
