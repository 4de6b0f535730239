"""The published losses' names and mathematics, written anew from their description, for tests of a checkout."""

import itertools

import torch


def similarity(z_list, criterion):
    z1, z2, z3, anchor = z_list
    centre = (z1 + z2 + z3) / 3
    return sum(criterion(z, anchor) + criterion(z, centre) for z in (z1, z2, z3))


def v_ac(x):
    n, d = x.shape
    cov = (x - x.mean(0)).T @ (x - x.mean(0)) / (n - 1)
    off = cov - torch.diag(cov.diagonal())
    return 5 * torch.relu(1 - (x.var(0) + 1e-4).sqrt()).mean() + (off**2).sum() / d


def xcorr_loss(z1, z2):
    a, b = ((z - z.mean(0)) / z.std(0) for z in (z1, z2))
    c = a.T @ b / len(a)
    diagonal = c.diagonal()
    return ((diagonal - 1) ** 2).sum() + 0.005 * ((c**2).sum() - (diagonal**2).sum())


def cal_xc(z_list):
    return sum(xcorr_loss(a, b) for a, b in itertools.combinations(z_list, 2))
