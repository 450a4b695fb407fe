"""What a method is besides its mathematics: which rows a step sees, and from where."""
