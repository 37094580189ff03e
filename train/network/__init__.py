"""What embeds images: encoders and heads, the momentum encoder, weights in and out."""
