"""What an attacker can see of each image, collected once for each encoder."""
