"""Somebody else's backbone, and a few labelled images: trained with the backbone frozen, then as a whole."""
