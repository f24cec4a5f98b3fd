"""The law: pure functions and frozen dataclasses on tensors."""
