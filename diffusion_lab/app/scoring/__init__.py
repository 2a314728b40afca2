"""What samples and models are worth: distances and other measures, likelihoods, and several of them side by side."""
