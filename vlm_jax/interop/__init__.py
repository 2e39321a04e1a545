"""Weights and processors in the layouts of others: safetensors, big_vision's npz, and reversible tables, one file a family."""
