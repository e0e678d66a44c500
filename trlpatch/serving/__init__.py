"""Serving: start the server that fits what was exported, wait until it answers, end it cleanly."""
