"""The web server ``align serve``: fine-tuning API, live runs and preference labels."""
