"""What a person does with a real browser."""
