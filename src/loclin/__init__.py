"""A language model, at one prompt, as the linear map that it exactly is there."""
