"""What the models of model_repository/ run inside tritonserver. Imports pipeline and errors alone."""
