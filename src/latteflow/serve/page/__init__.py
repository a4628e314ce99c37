"""The web page: Gradio in the browser, and on this side a client of our own HTTP API like any other."""
