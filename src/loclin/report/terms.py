"""Names of components for people."""

COMPONENTS = {"resid_post": "residual stream", "attn_out": "attention", "mlp_out": "MLP"}
