"""The engine of this project: the stock model's weights, computed so that no work is done twice."""
