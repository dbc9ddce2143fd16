"""From images, instructions and actions to model inputs, and back."""
