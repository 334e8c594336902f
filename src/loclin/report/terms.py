"""Names and notes that every kind of report uses."""

COMPONENTS = {"resid_post": "residual stream", "attn_out": "attention", "mlp_out": "MLP"}


def gate_note(gate: object) -> str:
    """Say which of several exact sets of shares is shown."""
    agrees = "half agrees best with removing tokens (docs/faithfulness.md)"
    if gate == "half":
        return f"Gate {agrees}; another gate gives other shares."
    return f"Gate {gate}. Another gate gives other shares; {agrees}."
