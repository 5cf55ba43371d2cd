"""Our speed against PyTorch's, both measured in one run."""
