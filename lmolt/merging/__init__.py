"""Fusing models and folding adapters, streamed tensor by tensor."""
