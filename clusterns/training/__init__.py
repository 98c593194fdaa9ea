"""What a training run is told, keeps, watches and leaves; the loop itself is `clusterns/train.py`."""
