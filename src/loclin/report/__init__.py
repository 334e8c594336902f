"""Results for people: terminal tables, a self-contained HTML page, notebook display, and files written whole."""
