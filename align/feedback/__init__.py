"""What people (and judges) said about what was shown to them: collected, audited, converted. Needs no torch."""
