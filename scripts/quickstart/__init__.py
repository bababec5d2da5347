"""What `build_quickstart.py` is made of: the stories, the two checkpoints, and the checks on them."""
