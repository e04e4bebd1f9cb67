"""Losses between feature maps.

Shape legend: B examples, C channels, H and W a feature map's height and width, N = H·W.
"""
