"""Where texts come from: files and datasets of the hub, memory-mapped, and this machine's documentation."""
