"""What tools/plan.py is made of. In reading order:

    units → stragglers → models → cost_model → predict (the simulator, asked) → table, plot
    published, measured: what the predictions are held against
"""
