"""One prompt with the vectors of all its parts, so that shares of any word need no model any more."""
