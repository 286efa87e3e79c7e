"""Hybrid HRM-LM models, trained on Ray. Start reading at `hrm_lm/training/loop.py`."""
