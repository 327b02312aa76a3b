"""What is known of the Open-X datasets by name: layouts, mixtures, and how each is standardized."""
