"""Estimated memory of a rank: of a forward and backward pass, of a whole step, and after the guard's fallback to TF32."""
