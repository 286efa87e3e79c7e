"""Pages about runs: how one went, and several side by side. They are made of what is in the runs' folders."""
