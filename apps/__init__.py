"""What people run: the `kvshare` command, its demo and its benchmarks."""
