"""The five terms that separate the influence estimate from retraining."""

import digits

import influence_ext as ie

data = digits.load(num_train=300, wrong_every=0)
run = digits.train(data, hidden=16, epochs=20)
decomposition = ie.decompose(run, remove=[[i] for i in range(0, 100, 10)], damping=1e-2)
print(decomposition.table())
decomposition.plot(digits.picture_path())
