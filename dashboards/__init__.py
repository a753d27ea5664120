"""Read model, HTTP API and web page."""
