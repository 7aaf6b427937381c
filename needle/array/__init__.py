"""Arrays: shapes, memory, and NDArray, the strided view that devices compute on. Start at
ndarray.py."""
