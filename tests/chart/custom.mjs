// Objects that are not of Kubernetes itself against the schemas of who takes them (npm's @kubernetes-models, in .tools). JSON on stdin; problems
// on stdout. What no schema looks at is a problem too: an API server would drop it in silence.
import { readFileSync } from "node:fs";

const models = new URL("../../.tools/node_modules/@kubernetes-models/", import.meta.url);
const folders = {
  HTTPRoute: "gateway-api/gateway.networking.k8s.io/v1",
  PodMonitor: "prometheus-operator/monitoring.coreos.com/v1",
  PrometheusRule: "prometheus-operator/monitoring.coreos.com/v1",
  ScaledObject: "keda/keda.sh/v1alpha1",
};

/** The value; `unread` is left with the paths that nobody has looked at. */
function watched(value, path, unread) {
  if (value === null || typeof value !== "object") return value;
  const entries = Object.entries(value).map(([key, each]) => [key, watched(each, `${path}/${key}`, unread)]);
  for (const [key] of entries) unread.add(`${path}/${key}`);
  const copy = Array.isArray(value) ? entries.map(([, each]) => each) : Object.fromEntries(entries);
  return new Proxy(copy, { get: (target, key) => (unread.delete(`${path}/${String(key)}`), target[key]) });
}

const problems = [];
for (const object of JSON.parse(readFileSync(0, "utf8"))) {
  const name = `${object.kind} ${object.metadata.name}`, unread = new Set();
  const kinds = await import(new URL(`${folders[object.kind]}/index.js`, models));
  try {
    kinds[object.kind].prototype.validate.call(watched(object, "", unread));
    problems.push(...[...unread].map((path) => `${name}: there is no ${path}`));
  } catch (error) {
    problems.push(`${name}: ${error.message}`);
  }
}
console.log(JSON.stringify(problems));
