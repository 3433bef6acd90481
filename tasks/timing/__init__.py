"""What a task costs: measured step times, the model that predicts them, and rejection sampling by it (VeLO C.4)."""
