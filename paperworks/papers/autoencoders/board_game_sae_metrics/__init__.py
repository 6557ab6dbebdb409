"""The paper `board-game-sae-metrics` and the parts that only it uses."""
