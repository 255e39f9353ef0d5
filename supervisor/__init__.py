"""What runs in the supervisor process."""
