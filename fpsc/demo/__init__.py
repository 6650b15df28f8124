"""`fpsc demo`: a small Wan model on clips that we draw ourselves, dense beside accelerated."""
