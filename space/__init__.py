"""The Gradio app of a published model."""
