"""What a run can train with: each file a method, from embeddings and labels to a loss."""
