"""The annotation page and the product endpoint. Minting tokens (`tokens`) needs no web framework."""
