{{- define "panotriton.fullname" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" }}{{ end -}}
{{- end }}

{{/* A release has parts, each a Deployment of servers: the front, which callers ask, and the pools that it asks. What
     is rendered for each part ranges over `prepend .Values.pools (dict)` and gets a root of its own, whose values
     are the release's with the pool's over them; .Pool is the pool, empty for the front. */}}
{{- define "panotriton.name" -}}
{{- if .Pool }}{{ printf "%s-%s" (include "panotriton.fullname" . | trunc (sub 53 (len .Pool.name) | int) | trimSuffix "-") .Pool.name }}
{{- else }}{{ include "panotriton.fullname" . }}{{ end -}}
{{- end }}

{{- define "panotriton.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{ include "panotriton.component" . }}
{{- end }}

{{- define "panotriton.component" -}}
app.kubernetes.io/component: {{ if .Pool }}pool-{{ .Pool.name }}{{ else }}server{{ end }}
{{- end }}

{{/* Without versions: in a pod they would roll every replica, and break a Job, though nothing else changed. */}}
{{- define "panotriton.podLabels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- with .Values.podLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Networks and where their pools are, as PANOTRITON_PLACE has it; a headless service gives every replica. */}}
{{- define "panotriton.placement" -}}
{{- range $i, $pool := .Values.pools -}}
{{- if $i }} {{ end -}}
{{ join "," $pool.models }}={{ include "panotriton.name" (dict "Pool" $pool "Chart" $.Chart "Release" $.Release) }}-headless.{{ $.Release.Namespace }}.svc:8001
{{- end -}}
{{- end }}

{{- define "panotriton.image" -}}
{{- if .digest }}{{ .repository }}@{{ .digest }}{{ else }}{{ .repository }}:{{ .tag }}{{ end -}}
{{- end }}

{{/* What runs: Deployments of the chart, or of KServe. */}}
{{- define "panotriton.deployment" -}}
{{ include "panotriton.name" . }}{{ if and .Values.kserve.enabled (not .Pool) }}-predictor{{ end }}
{{- end }}

{{- define "panotriton.labels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "panotriton.serviceAccount" -}}
{{ .Values.serviceAccount.name | default (ternary (include "panotriton.fullname" .) "default" .Values.serviceAccount.create) }}
{{- end }}

{{/* What the restricted pod security standard asks of every container. */}}
{{- define "panotriton.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "panotriton.podSecurity" -}}
runAsNonRoot: true
runAsUser: 1000
runAsGroup: 1000
fsGroup: 1000
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{/* Seconds from the preStop hook to SIGKILL: leaving the endpoints, groups in flight, and a margin to exit in. */}}
{{- define "panotriton.graceSeconds" -}}
{{ add .Values.shutdown.drainSeconds .Values.shutdown.longestGroupSeconds 30 }}
{{- end }}

{{- define "panotriton.gpu" -}}
{{- if or .Values.gpu.claimTemplate .Values.gpu.count }}true{{ else }}false{{ end -}}
{{- end }}

{{/* A quantity of bytes in whole Mi, rounded down. */}}
{{- define "panotriton.mebibytes" -}}
{{- $units := dict "k" 0.00095367431640625 "M" 0.95367431640625 "G" 953.67431640625 "T" 953674.31640625 "Ki" 0.0009765625 "Mi" 1.0 "Gi" 1024.0 "Ti" 1048576.0 -}}
{{- $unit := regexFind "[A-Za-z]+$" . -}}
{{- $factor := 0.00000095367431640625 -}}
{{- if $unit }}{{ $factor = get $units $unit }}{{ end -}}
{{ mulf (trimSuffix $unit . | float64) $factor | floor | int64 }}
{{- end }}

{{/* Mi that the copy of an object store's models adds to /tmp. */}}
{{- define "panotriton.downloadMebibytes" -}}
{{- if has .Values.repository.source (list "s3" "gcs") }}{{ include "panotriton.mebibytes" .Values.repository.downloadSize }}{{ else }}0{{ end -}}
{{- end }}

{{/* Requests or limits, ephemeral storage with room for the copy. */}}
{{- define "panotriton.resourceList" -}}
{{- $list := deepCopy .list -}}
{{- $more := include "panotriton.downloadMebibytes" .root | int64 -}}
{{- with index $list "ephemeral-storage" -}}
{{- if $more }}{{ $_ := set $list "ephemeral-storage" (printf "%dMi" (add $more (include "panotriton.mebibytes" .))) }}{{ end -}}
{{- end -}}
{{- toYaml $list }}
{{- end }}

{{- define "panotriton.repositoryAddress" -}}
{{- if eq .Values.repository.source "s3" }}{{ .Values.repository.s3.address }}
{{- else if eq .Values.repository.source "gcs" }}{{ .Values.repository.gcs.address }}
{{- else }}/models{{ end -}}
{{- end }}

{{/* What waits for execution over all replicas: groups, or a pool's calls. `or vector(0)`: no series is no queue. */}}
{{- define "panotriton.pendingQuery" -}}
{{- $models := .Values.autoscaling.models }}{{ if .Pool }}{{ $models = join "|" .Pool.models }}{{ end -}}
sum(nv_inference_pending_request_count{namespace="{{ .Release.Namespace }}",pod=~"{{ include "panotriton.name" . }}-.*",model=~"{{ $models }}"}) or vector(0)
{{- end }}

{{/* Seconds in queues per finished group. The floor is one group in the five minutes that are looked at: with
     none finished yet, what has waited is one group's. */}}
{{- define "panotriton.queueQuery" -}}
sum(rate(nv_inference_queue_duration_us{namespace="{{ .Release.Namespace }}",pod=~"{{ include "panotriton.fullname" . }}-.*",model=~"{{ .Values.autoscaling.models }}"}[5m])) / 1e6 / clamp_min(sum(rate(nv_inference_request_success{namespace="{{ .Release.Namespace }}",pod=~"{{ include "panotriton.fullname" . }}-.*",model="panorama"}[5m])), 0.0033) or vector(0)
{{- end }}

{{/* With TLS the server has no HTTP, and gRPC is no clear-text HTTP/2. */}}
{{- define "panotriton.servicePorts" -}}
{{- if and .Values.tls.secret (not .Pool) -}}
- {name: grpc, port: 8001, targetPort: grpc}
{{- else -}}
- {name: http, port: 8000, targetPort: http, appProtocol: http}
- {name: grpc, port: 8001, targetPort: grpc, appProtocol: kubernetes.io/h2c}
{{- end }}
{{- end }}
