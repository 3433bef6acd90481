"""The two sets of input columns that the kernels know, in the order of the first layer's rows.

Owns nothing else; ``features.columns`` says what each is.
"""

SMALL_FC_COLUMNS = (
    "g", "p", "m", "v", "m_rsqrt", "rsqrt", "factored_g", "row", "col", "row_rsqrt", "col_rsqrt", "factored_m",
)  # fmt: skip
VELO_COLUMNS = (
    "g", "clipped_g", "p", "m", "v", "m_rsqrt", "rsqrt", "factored_g", "g_rsqrt",
    "row", "col", "row_rsqrt", "col_rsqrt", "factored_m",
)  # fmt: skip
